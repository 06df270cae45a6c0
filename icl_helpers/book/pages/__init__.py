"""Pages of the book that are made when it is built."""
