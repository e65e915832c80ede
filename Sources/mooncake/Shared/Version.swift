/// Version of the program; the same as that of the library it is built with.
let programVersion = "0.1.0"
