"""Everything that touches MLflow: runs, their spool, logged models, the served form."""
