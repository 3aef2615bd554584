"""The walk through the model: meeting points, Hessians, journal."""
