"""How captions are made: engines, and the replies that they gave."""
