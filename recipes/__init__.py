"""Runnable examples of distributed training, one package per chapter; what they share is in `recipes.lib`."""
