"""Everything that touches MLflow or S3: runs, their spool, logged models, the served form, data in a store."""
