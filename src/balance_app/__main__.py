"""`python -m balance_app` is `balance-app`."""

from balance_app.cli.app import main

if __name__ == "__main__":
    main()
