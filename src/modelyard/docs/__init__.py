"""The documentation that the server shows of itself: the OpenAPI schema, Swagger UI, and the manual.

`openapi` completes FastAPI's schema, `guide` renders the manual's Markdown as pages, and `routes` serves both. All of
it works with no internet and wants the key where the server has one. No path of a request is a name of a file here.
"""
