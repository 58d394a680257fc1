"""Number formats and quantised layers. Imports nothing of this project; knows no model."""
