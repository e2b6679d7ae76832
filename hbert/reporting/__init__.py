"""What `hbert report` and the benchmark share: self-contained HTML pages, and figures in a light and a dark form."""
