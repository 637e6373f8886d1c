"""The head gate: does this head need the bulk keys for this query?"""
