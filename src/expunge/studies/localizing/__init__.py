"""What `localization` runs, apart from the room of studies, which is read without torch."""
