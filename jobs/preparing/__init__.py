"""What `jobs.prepare` is made of: documents, their tokens, rows and shards, duplicates, and the work on one object."""
