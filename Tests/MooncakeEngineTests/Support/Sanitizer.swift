import Glibc

/// What the tests run under.
enum Sanitizer {
  static let isThread = dlsym(nil, "__tsan_init") != nil
  static let isAny = isThread || dlsym(nil, "__asan_init") != nil
}
