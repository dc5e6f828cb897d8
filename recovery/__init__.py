"""Every decision of tabpool as pure code, and the words in which it is made.

Lowest room of the house: it imports no browser, no Ray and no network.
"""
