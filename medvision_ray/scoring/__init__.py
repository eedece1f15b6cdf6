"""From a bundle and an inventory to prediction and failure rows, published once."""
