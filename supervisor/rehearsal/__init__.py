"""The rehearsal: the user's agent under the real supervisor, stopped as each platform would."""
