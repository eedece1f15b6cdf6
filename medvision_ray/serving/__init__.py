"""What answers over HTTP: the API for systems and the viewer page for people."""
