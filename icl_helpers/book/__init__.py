"""Building the HTML book from pages and executed notebooks."""
