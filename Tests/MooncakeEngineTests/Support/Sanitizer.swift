import Glibc

/// The sanitizer that the tests run under, if any.
enum Sanitizer {
  static let isThread = dlsym(nil, "__tsan_init") != nil
  static let isAny = isThread || dlsym(nil, "__asan_init") != nil
}
