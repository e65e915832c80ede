import CLinux
import Glibc

/// A shared library opened at run time; it stays loaded until the process ends.
package struct DynamicLibrary: Sendable {
  private nonisolated(unsafe) let handle: UnsafeMutableRawPointer

  /// Opens a library by its versioned name, such as "libcurl.so.4"; nil if it is not installed.
  /// Call it inside `Fork.prepare`: a child forked during the load would have half a library.
  package init?(_ name: String) {
    guard let handle = dlopen(name, RTLD_NOW | RTLD_LOCAL) else { return nil }
    self.handle = handle
  }

  /// The address of a function; cast it to its C type with `unsafeBitCast`.
  package func symbol(_ name: String) -> UnsafeMutableRawPointer? { dlsym(handle, name) }
}
