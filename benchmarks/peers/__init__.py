"""Forebay and its peers side by side: `forebay bench peers`."""
