def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*names): the commands that must have succeeded before the test")
