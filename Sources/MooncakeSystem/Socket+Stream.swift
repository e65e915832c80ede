import CLinux
import Glibc

extension Socket {
  /// Sends as much as the socket accepts now; nil if nothing. A closed peer is an error, never a
  /// signal.
  package func trySend(_ bytes: UnsafeRawBufferPointer) throws(Errno) -> Int? {
    do throws(Errno) {
      return try retryingInterrupts {
        Glibc.send(rawValue, bytes.baseAddress, bytes.count, Int32(MSG_NOSIGNAL))
      }
    } catch {
      if error == .wouldBlock { return nil }
      throw error
    }
  }

  /// As above, for the bytes from `index` on.
  package func trySend(_ bytes: [UInt8], from index: Int) throws(Errno) -> Int? {
    let result = bytes.withUnsafeBytes { buffer in
      Result { () throws(Errno) in
        try trySend(UnsafeRawBufferPointer(rebasing: buffer[index...]))
      }
    }
    return try result.get()
  }

  /// Receives what has arrived; nil if nothing has, 0 when the peer has finished sending.
  package func tryReceive(into bytes: UnsafeMutableRawBufferPointer) throws(Errno) -> Int? {
    do throws(Errno) {
      return try retryingInterrupts { Glibc.recv(rawValue, bytes.baseAddress, bytes.count, 0) }
    } catch {
      if error == .wouldBlock { return nil }
      throw error
    }
  }
}
