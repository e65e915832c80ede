/* dlopen finds every name of exports.map with its version, and no internal name.
 * exported_names.h is written by scripts/test-abi. */
#include <dlfcn.h>

#include "check.h"

#include "exported_names.h"

int main(int argument_count, char **arguments) {
  static const char *const hidden_names[] = {"swift_retain", "swift_release", "swift_allocObject"};
  size_t count = sizeof exported_names / sizeof exported_names[0];
  REQUIRE(argument_count == 2);
  void *handle = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (handle == NULL) {
    fprintf(stderr, "dlopen: %s\n", dlerror());
    return 1;
  }
  for (size_t index = 0; index < count; index += 1) {
    const char *name = exported_names[index].name;
    const char *version = exported_names[index].version;
    void *plain = dlsym(handle, name);
    void *versioned = dlvsym(handle, name, version);
    if (!CHECK(plain != NULL) || !CHECK(versioned == plain)) {
      fprintf(stderr, "  %s, version %s\n", name, version);
    }
    if (!CHECK(dlsym(RTLD_DEFAULT, name) == NULL)) {
      fprintf(stderr, "  %s leaks out of RTLD_LOCAL\n", name);
    }
  }
  for (size_t index = 0; index < sizeof hidden_names / sizeof hidden_names[0]; index += 1) {
    if (!CHECK(dlsym(handle, hidden_names[index]) == NULL)) {
      fprintf(stderr, "  %s is visible\n", hidden_names[index]);
    }
  }
  printf("%zu names\n", count);
  return check_result("symbols");
}
