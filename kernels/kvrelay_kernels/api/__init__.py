"""The public functions, one module per operation: checks the arguments, picks the implementation."""
