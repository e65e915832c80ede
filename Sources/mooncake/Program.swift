import ArgumentParser
import Glibc
import MooncakeSystem

/// Where the program begins.
@main
enum Program {
  static func main() {
    // What cannot be written is an error of the write.
    signal(SIGPIPE, SIG_IGN)
    signal(SIGXFSZ, SIG_IGN)
    openStandardDescriptors()
    let arguments = ArgumentText.ofProcess()
    ArgumentText.hideSecretsOfProcess()
    do {
      var command = try MooncakeCommand.parseAsRoot(arguments)
      try ArgumentText.refuseNames(in: arguments)
      try command.run()
      try Output.check()
    } catch {
      exit(error, arguments)
    }
  }

  /// Says why and ends. What the message quotes of the arguments may be a URI with a password.
  private static func exit(_ error: any Error, _ arguments: [String]) -> Never {
    let message = MooncakeCommand.fullMessage(for: error)
    let shown = ArgumentText.hidingSecrets(of: arguments, in: message)
    if shown == message { MooncakeCommand.exit(withError: error) }
    printError(shown)
    Glibc.exit(MooncakeCommand.exitCode(for: error).rawValue)
  }

  /// Else the first socket or file would take their numbers, and text would be written into it.
  private static func openStandardDescriptors() {
    for number in 0...2 where fcntl(Int32(number), F_GETFD) == -1 { _ = open("/dev/null", O_RDWR) }
  }
}
