"""The report, one self-contained HTML file: `gallery.choose` names the images it shows, `page.render` writes it."""
