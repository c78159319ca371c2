"""What each platform is told so that its kill timer never comes before the end of grace."""
