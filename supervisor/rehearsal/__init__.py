"""The fire drill: the user's own agent under the real supervisor, stopped as each platform would."""
