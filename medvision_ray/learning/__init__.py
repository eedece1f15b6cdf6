"""Training: label tables, augmentation, the hybrid CNN, its loss and its schedule. Imports nothing heavy."""
