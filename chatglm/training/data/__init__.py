"""What trainings and evaluations read: rows of files, their token ids, and batches of those."""
