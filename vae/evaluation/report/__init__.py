"""The report, one self-contained HTML file: `gallery.choose` picks its images, and `page.render` writes it."""
