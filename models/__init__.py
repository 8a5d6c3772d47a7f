"""Small networks that this project trains itself, with their data: `edgewise.models.digits`."""
