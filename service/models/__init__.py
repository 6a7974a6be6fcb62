"""Which models are in service, and how new ones come in while the old ones go on."""
