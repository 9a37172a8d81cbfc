"""What is made of a result: CSV, Markdown, one HTML page with the roofline, and the comparison of two."""
