"""One run: its folder, its stages, resume, finish, export."""
