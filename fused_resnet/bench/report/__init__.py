"""What is made of a result: CSV, Markdown, one HTML page with plots, and the comparison of two."""
