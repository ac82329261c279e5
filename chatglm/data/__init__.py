"""What people wrote: rows of files of any form, and the questions and answers that they mean."""
