"""The passes through the model, and the tables that they write."""
