"""The processes of a world: who this one is, and how all of them agree, meet and fail together."""
