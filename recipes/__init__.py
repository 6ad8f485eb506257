"""Runnable examples of distributed training, one package per chapter; what they share is in `recipes.lib`."""

from recipes.lib.garbage import spare_imports

spare_imports()  # here, because every recipe's process comes by here before it imports torch
