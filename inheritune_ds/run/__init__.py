"""One run: its folder, its stages, how it resumes and finishes."""
