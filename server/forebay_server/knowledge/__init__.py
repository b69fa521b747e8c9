"""Knowledge bases: documents parsed, cut, found, and answered from."""
