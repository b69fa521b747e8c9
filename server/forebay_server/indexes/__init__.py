"""Dense and keyword indexes with typed payload filters: what searches run on."""
