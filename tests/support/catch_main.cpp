// support/catch_main.cpp — main of Catch2 2.13, where the installed one is for another machine or standard library.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
