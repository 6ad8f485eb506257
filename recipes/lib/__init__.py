"""What the chapters share. This package imports none of its modules, so that arguments stay torch-free."""
