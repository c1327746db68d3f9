from classification.explain import main

if __name__ == "__main__":
    main()
