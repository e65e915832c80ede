/* Loads and uses the library where no Swift installation is visible; scripts/test-abi hides it
 * and empties the environment. The process's list of mappings proves that none was used. */
#include "loaded.h"

static void require_no_swift_library(void) {
  char line[4096];
  FILE *maps = fopen("/proc/self/maps", "r");
  REQUIRE(maps != NULL);
  while (fgets(line, sizeof line, maps) != NULL) {
    const char *path = strchr(line, '/');
    if (path != NULL && strstr(path, "libswift") != NULL) {
      fprintf(stderr, "loaded a library of the toolchain: %s", path);
      exit(1);
    }
  }
  fclose(maps);
}

int main(int argument_count, char **arguments) {
  unsigned char *memory = NULL;
  /* The path of the library, then a toolchain file that must be invisible. */
  REQUIRE(argument_count == 3);
  REQUIRE(access(arguments[2], F_OK) != 0);
  loaded_t library = load_library(arguments[1]);
  mooncake_engine_t *engine = loaded_create(&library, &memory);
  loaded_round_trip(&library, engine, memory, 1);
  require_no_swift_library();
  loaded_destroy(&library, engine, memory);
  printf("libmooncake %s works without a toolchain\n", library.mooncake_version());
  return check_result("hidden_toolchain");
}
