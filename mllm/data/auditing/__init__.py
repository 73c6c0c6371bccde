"""Looking at data before a model does: findings, rows as a model reads them, charts, pages."""
