"""``crosstrain verify``: does a user's own training resume exactly?"""
