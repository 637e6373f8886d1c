"""Long-range tasks and the tables made from them."""
