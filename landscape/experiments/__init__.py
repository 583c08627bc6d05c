"""What needs both training and measuring: runs, maps, the reproduction."""
