"""Reports: self-contained HTML pages with plots as inline SVG."""
