"""`lastcall doctor`: what is gathered about the surroundings, and one pure check for each thing to know."""
